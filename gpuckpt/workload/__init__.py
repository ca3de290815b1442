"""What is served: the launch line, health, warm-up, quiesce and canary of each kind of server."""
