"""The data flow: ingest, the store, the six steps, the engines and the command line."""
