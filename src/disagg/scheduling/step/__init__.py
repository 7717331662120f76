"""What one instance computes, pulls, offers and frees: the step scheduler."""
