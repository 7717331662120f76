"""Makes the helper modules beside this file importable from the tests below it."""
