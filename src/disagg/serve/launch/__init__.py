"""Engine instances as local processes, and the server that is made of them, the router and the API."""
