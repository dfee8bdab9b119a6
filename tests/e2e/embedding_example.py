"""The code of docs/how-to/embed.md; tests/e2e/test_mounting.py runs it and compares the page with it."""

# fmt: off
# -- whole
from fastapi import FastAPI

from transports.app import create_app, lifespan_of

chat = create_app()
app = FastAPI(lifespan=lifespan_of(chat))
app.mount("/assistant", chat)


@app.get("/orders/{number}")
async def order(number: int) -> dict[str, int]:
    await chat.state.broker.publisher("orders").publish("log", {"message": f"order {number} was looked at", "level": "info"})
    return {"number": number}
# -- end


# -- parts
from transports.app import create_api, create_broker, create_ui  # noqa: E402

broker = create_broker()
site = FastAPI(lifespan=lifespan_of(broker))
site.mount("/broker", create_api(broker))
site.mount("/chat", create_ui(api_base="/broker/"))
# -- end

# -- on_demand
from transports.on_demand import StartedOnDemand  # noqa: E402

application = StartedOnDemand(app)  # for daphne my_module:application
# -- end
