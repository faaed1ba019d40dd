"""First-party callbacks for lightning-sft."""
