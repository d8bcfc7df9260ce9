"""Serving: a scheduler over an executor's slots, and an OpenAI-compatible HTTP server over it.

    requests     what is asked of the engine, and what it answers
    detokenizer  tokens to whole characters     stopping   stop strings across pieces
    slots        who is where, and what of a prompt can be reused
    sequence     one request while it runs      scheduler  the tick
    engine       the thread, the queue, the state

Up to here nothing knows of HTTP, and the packages of the extra `serve` are not needed.

    streams      outputs find the request that waits for them, in the event loop
    bodies       what clients send              answers    what they get
    intake       from a body to requests        events     server-sent events
    handlers     from bodies to answers
    gate         keys, sizes, ids               errors     statuses and bodies
    app, page    routes                         chat       templates
    metrics, watchdog, pool (its size), server (a bundle becomes an application)
    door         what answers while it loads    process    from the open port to the exit code
"""
