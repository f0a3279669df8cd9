"""The routes of a replica, one file for each group."""
