"""The demo model: a trained checkpoint in the published Kimi-Linear layout (see examples/demo_model)."""
