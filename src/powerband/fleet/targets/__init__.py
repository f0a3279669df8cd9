"""Where instances run: today as processes of this machine."""
