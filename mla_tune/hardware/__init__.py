"""On what it is chosen: GPU products, the driver's view of a device, and the vendors' figures."""
