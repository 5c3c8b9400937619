"""The six steps, in the order of the chain: download, caption, phrases, ground, select, pack."""
