"""`lightning-sft plan`: what a run would take, told before anything runs."""
