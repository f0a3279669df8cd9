"""One deployment in virtual time: its clients, its inputs and its summary."""
