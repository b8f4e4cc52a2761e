"""The restricted Pod Security Standard, written from the published list of its controls, apart from the plugin.

https://kubernetes.io/docs/concepts/security/pod-security-standards/ (baseline and restricted, Linux pods)
"""

from collections.abc import Iterator
from typing import Any

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
SAFE_SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
}


def restricted(template: dict[str, Any]) -> list[str]:
    """What a pod template violates, in the words of the admission controller; empty where it passes."""
    spec = template["spec"]
    pod = spec.get("securityContext") or {}
    return [*_of_pod(spec, pod, template), *(fault for one in _containers(spec) for fault in _of_container(one, pod))]


def _containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for kind in ("initContainers", "containers", "ephemeralContainers") for one in spec.get(kind) or ()]


def _of_pod(spec: dict[str, Any], pod: dict[str, Any], template: dict[str, Any]) -> Iterator[str]:
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(name):
            yield f"host namespaces ({name}=true)"
    for volume in spec.get("volumes") or ():
        if bad := volume.keys() - {"name"} - VOLUMES:
            yield f'restricted volume types (volume "{volume["name"]}" uses restricted volume type "{bad.pop()}")'
    if pod.get("runAsUser") == 0:
        yield "runAsUser=0 (pod must not set runAsUser=0)"
    for sysctl in pod.get("sysctls") or ():
        if sysctl["name"] not in SAFE_SYSCTLS:
            yield f"forbidden sysctls ({sysctl['name']})"
    if (pod.get("windowsOptions") or {}).get("hostProcess"):
        yield "hostProcess"
    for name, value in ((template.get("metadata") or {}).get("annotations") or {}).items():
        if name.startswith("container.apparmor.security.beta.kubernetes.io/") and value == "unconfined":
            yield f"forbidden AppArmor profile ({name})"


def _of_container(container: dict[str, Any], pod: dict[str, Any]) -> Iterator[str]:
    own, name = container.get("securityContext") or {}, container["name"]
    if own.get("privileged"):
        yield f'privileged (container "{name}" must not set securityContext.privileged=true)'
    if own.get("allowPrivilegeEscalation") is not False:
        yield (
            f'allowPrivilegeEscalation != false (container "{name}" must set '
            "securityContext.allowPrivilegeEscalation=false)"
        )
    capabilities = own.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or ()) or set(capabilities.get("add") or ()) - {"NET_BIND_SERVICE"}:
        yield f'unrestricted capabilities (container "{name}" must set securityContext.capabilities.drop=["ALL"])'
    if own.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        yield f'runAsNonRoot != true (pod or container "{name}" must set securityContext.runAsNonRoot=true)'
    if own.get("runAsUser") == 0:
        yield f'runAsUser=0 (container "{name}" must not set runAsUser=0)'
    profile = (own.get("seccompProfile") or pod.get("seccompProfile") or {}).get("type")
    if profile not in ("RuntimeDefault", "Localhost"):
        yield (
            f'seccompProfile (pod or container "{name}" must set securityContext.seccompProfile.type to '
            '"RuntimeDefault" or "Localhost")'
        )
    if own.get("procMount", "Default") != "Default":
        yield f'procMount (container "{name}")'
    if (own.get("appArmorProfile") or pod.get("appArmorProfile") or {}).get("type") == "Unconfined":
        yield f'forbidden AppArmor profile (container "{name}")'
    selinux = {**(pod.get("seLinuxOptions") or {}), **(own.get("seLinuxOptions") or {})}
    types = ("", "container_t", "container_init_t", "container_kvm_t", "container_engine_t")
    if selinux.get("type", "") not in types or selinux.get("user") or selinux.get("role"):
        yield f'seLinuxOptions (container "{name}")'
    for port in container.get("ports") or ():
        if port.get("hostPort"):
            yield f'hostPort (container "{name}" uses hostPort {port["hostPort"]})'
    for handler in (container.get("livenessProbe"), container.get("readinessProbe"), container.get("startupProbe")):
        if (((handler or {}).get("httpGet")) or {}).get("host"):
            yield f'probe or lifecycle host (container "{name}")'
