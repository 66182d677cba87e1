"""The one network: its config, parameters, checkpoints, attention and rotary embedding."""
