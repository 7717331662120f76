"""Campaigns that measure a machine and its links, and fit ``costs`` to what they saw."""
