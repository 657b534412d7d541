"""E16: two teachers for two domains: one domain an update against both in one."""
