"""What people type: the commands that `cli.py` hangs into its groups. Heavy imports happen when one runs."""
