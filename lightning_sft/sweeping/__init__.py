"""`lightning-sft sweep`: many runs of one configuration, over options that are searched."""
