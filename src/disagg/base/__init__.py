"""Words shared by every room: ids, requests, messages, configuration, errors, the clock."""
