"""Turn folders, globs, lists and csv files into one table of videos."""
