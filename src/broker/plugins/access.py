"""Access: asks the `authenticate` and `authorize` hooks, and knows what holds where none is configured."""

from __future__ import annotations

from collections.abc import Sequence

from broker.errors import AuthenticationFailed, PermissionDenied, PluginError
from broker.plugins.host import PluginHost
from broker.security import Action, Credentials, Principal
from broker.settings import Settings


class Access:
    """Who is calling, and may they.

    Without `auth` configured the server listens on loopback only and its callers are one principal, `local`. It has the
    `debug` permission only where debug channels were switched on: `debug.*` is denied by default (I14).
    """

    def __init__(self, settings: Settings, plugins: PluginHost) -> None:
        self._settings = settings
        self._plugins = plugins
        self._local = Principal("local", frozenset({"debug"}) if settings.debug_channels else frozenset())

    @property
    def asks(self) -> bool:
        """Whether any plugin is asked who may do what."""
        return self._plugins.has("authorize")

    async def authenticate(self, credentials: Credentials) -> Principal:
        """Return the caller. With `auth` the plugin of that name is asked, and no other one's answer counts.

        Raises AuthenticationFailed when nobody who is asked knows the credentials, also where that plugin was switched off.
        """
        auth = self._settings.auth
        found = await self._plugins.acall_first_named("authenticate", _only=auth, credentials=credentials)
        if found is not None:
            principal: Principal = found[1]
            return principal
        if auth is None:
            return self._local
        raise AuthenticationFailed(
            "credentials are missing or nobody here knows them: send 'Authorization: Bearer <token>'"
        )

    async def may_read(self, principal: Principal, conv_id: str, channels: Sequence[str] = ()) -> bool:
        """Say whether every `authorize` hook lets a caller read a conversation, in these channels."""
        try:
            await self.authorize(principal, "read", conv_id, channels)
        except PermissionDenied:
            return False
        return True

    async def authorize(
        self, principal: Principal, action: Action, conv_id: str | None, channels: Sequence[str] = ()
    ) -> None:
        """Return if every `authorize` hook agrees. Raises PermissionDenied; a hook that raises denies."""
        if action == "debug" and not principal.may("debug"):
            raise PermissionDenied(
                f"{principal.subject!r} does not have the permission 'debug'; on a server without auth it comes with "
                "--debug-channels",
                permission="debug",
            )
        try:
            answers = await self._plugins.acall_collect(
                "authorize", principal=principal, action=action, conv_id=conv_id, channels=list(channels)
            )
        except PluginError as exc:  # fails closed: who cannot decide does not allow
            raise PermissionDenied(f"nobody could decide whether {action!r} is allowed; denied") from exc
        for plugin, allowed in answers:
            if not allowed:
                about = f"channels {', '.join(channels)} of " if channels else ""
                raise PermissionDenied(
                    f"{principal.subject!r} may not {action} {about}conversation {conv_id!r} (plugin {plugin!r})",
                    action=action,
                    conv_id=conv_id,
                )
