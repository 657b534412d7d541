"""E6: how long and how varied the trained students' responses are."""
