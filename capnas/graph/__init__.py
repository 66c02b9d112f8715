"""The dataflow graph of a network: traced without computing, compared by canonical hash, walked for its structure."""
