"""Studies of quality and speed: what `sparsereel eval` runs. The metrics themselves live in `sparsereel_eval`."""
