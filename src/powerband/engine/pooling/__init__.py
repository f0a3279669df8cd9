"""From the hidden states of whole prompts to one vector for each."""
