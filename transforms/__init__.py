"""Pure functions on records and columns: numpy, Pillow and pyarrow, no model, no network, no engine."""
