"""Which videos: folders, globs, lists and csv files become one table."""
