"""Process groups: launchers, collectives, failure detection and the graceful stop."""
