"""What the e2e scripts share: places, processes, real services, OCI layouts, the driver itself."""
