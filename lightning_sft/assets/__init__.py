"""The embedded tiny base model, its data, and the seeded scripts that made them."""
