"""Read, write and check the Zarr target store."""
