"""The one door: what callers from outside may ask, with their permissions checked."""

from broker.api.doors import Doors
from broker.api.following import Following
from broker.delivery.admission import Admitted
from broker.delivery.subscription import SubscribeRequest, Subscription
from broker.runs.service import ActionResult, SendResult
from broker.timeline.entity import Entity

__all__ = ["ActionResult", "Admitted", "Doors", "Entity", "Following", "SendResult", "SubscribeRequest", "Subscription"]
