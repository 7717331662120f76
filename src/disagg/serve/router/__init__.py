"""The router: dispatch carried out between the API and the engine instances."""
