"""The wire: messages, their mapping to `types`, and the descriptor channel. No pickle."""
