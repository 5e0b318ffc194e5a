"""
What Flower loads: a `ServerApp` and a `ClientApp` for any application of ours. A client process starts anew for every
message, so this module imports no torch; where a [resident](resident.py) stands at the site, no process ever waits
for one.
"""

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from hf_mlopt.errors import InputError
from hf_mlopt.federated.engines.application import load_application
from hf_mlopt.federated.engines.flower_records import from_flat, to_flat
from hf_mlopt.federated.engines.resident import ask


# One assignment each: Flower looks for them in the source.
server_app = ServerApp()
client_app = ClientApp()


@server_app.main()
def _serve(grid: Grid, context: Context) -> None:
    from hf_mlopt.federated.engines.flower import FlowerEngine

    run_config = dict(context.run_config)
    engine = FlowerEngine.from_run_config(grid, run_config)
    try:
        load_application(run_config).serve(engine, run_config)
    finally:
        engine.close()


@client_app.query("hello")
def _hello(message: Message, context: Context) -> Message:
    run_config, node_config = dict(context.run_config), dict(context.node_config)
    try:
        if "resident" in node_config:
            said = {"site": ask(node_config["resident"], run_config, node_config)[0]}
        else:
            said = {"site": load_application(run_config).answer_factory(run_config, node_config)[0]}
    except InputError as error:  # which the server passes on before the first round
        said = {"error": str(error)}
    return Message(RecordDict({"hello": ConfigRecord(said)}), reply_to=message)


@client_app.train("step")
def _step(message: Message, context: Context) -> Message:
    run_config, node_config = dict(context.run_config), dict(context.node_config)
    flat = to_flat(message.content)
    if "resident" in node_config:
        _, header, blobs = ask(node_config["resident"], run_config, node_config, *flat)
    else:
        from hf_mlopt.federated.engines.site import Site

        header, blobs = Site(load_application(run_config), run_config, node_config).answered(*flat)
    return Message(from_flat(header, blobs), reply_to=message)
