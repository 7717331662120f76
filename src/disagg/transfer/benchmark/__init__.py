"""How fast KV blocks get from one process to another, beside what memory and sockets give."""
