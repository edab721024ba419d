"""Middlewares between the network and the application: plain ASGI, one subject each, none of which keeps a body."""
