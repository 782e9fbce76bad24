"""What the command `step3` runs. The modules are scripts that also run by themselves, from a checkout."""
