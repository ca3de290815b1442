"""The guest's HTTP interface: OpenAI's endpoints, sessions, a page to look at a paused one."""
