"""Everything that knows diffusers: schedulers, the model hook, `enable`."""
