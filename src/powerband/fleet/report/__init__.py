"""What commands show of a service: its status, its events and incidents, and its verification."""
