"""The controller of a service: it observes instances and gateway, decides what to change, and acts."""
