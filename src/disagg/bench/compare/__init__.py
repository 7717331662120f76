"""Several servers on the same cores, one after the other, asked the same: what each does, and the ratios between them.

This room's other part that starts processes and waits, beside the load client.
"""
