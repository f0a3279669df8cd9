"""How a plan is shown: tables, JSON, an HTML page, and the reasons for the choice."""
