"""The Zarr target store: its format, its writer and its readers."""
