"""The layers of a transformer: norm, rotary positions, MLP, attention, block."""
