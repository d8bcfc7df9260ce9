"""Serving: a scheduler over an executor's slots, and an OpenAI-compatible HTTP server over it.

    requests     what is asked of the engine and what it answers
    detokenizer  tokens to whole characters      stopping   stop strings across pieces
    slots        who is where, and what can be reused of a prompt
    sequence     one request while it runs       scheduler  the tick
    engine       the thread, the queue, the state

Up to here nothing knows of HTTP, and the packages of the extra `serve` are not needed.
"""
