"""The exchange: filled rows of every device's buckets to the devices that the buckets are for."""
