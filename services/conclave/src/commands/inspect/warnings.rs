//! What a person should look at in a cluster. Pure.

use super::view::{Member, View};

/// The warnings, the gravest first.
pub fn of(view: &View) -> Vec<String> {
    let mut warnings = Vec::new();
    if !view.coordinator_reachable {
        warnings.push("the coordinator (etcd) is not reachable from this router: this is the last known map".into());
    }
    if !view.of("attention").any(|member| member.is_ready() && view.is_ours(member)) {
        warnings.push("no attention replica is ready".into());
    }
    warnings.extend(absent(view));
    warnings.extend(fingerprints(view));
    warnings.extend(numerics(view));
    warnings.extend(view.members.iter().filter_map(unwell));
    warnings
}

fn absent(view: &View) -> Option<String> {
    let absent: Vec<&str> = view.cells.iter().filter(|cell| cell.ready == 0).map(|cell| cell.cell.as_str()).collect();
    match absent.as_slice() {
        [] => None,
        [cell] => Some(format!("cell {cell} has no ready replica")),
        cells => Some(format!("cells {} have no ready replica", cells.join(", "))),
    }
}

fn fingerprints(view: &View) -> Vec<String> {
    let ours = short(&view.model.fingerprint);
    let others = view.members.iter().filter(|member| !view.is_ours(member));
    let warning = |member: &Member| {
        let theirs = short(&member.fingerprint);
        format!("{} has another checkpoint ({theirs}, not {ours}): it gets no work", member.instance)
    };
    others.map(warning).collect()
}

fn numerics(view: &View) -> Option<String> {
    let ids = view.numerics();
    (ids.len() > 1).then(|| format!("numerics ids are mixed ({}): bits may differ between replicas", ids.join(", ")))
}

fn unwell(member: &Member) -> Option<String> {
    let why = match member.health.as_str() {
        "set-aside" => "is set aside: calls to it failed",
        "unverified" => "has no record any more, its lease has run out: used until a call to it fails",
        _ => return None,
    };
    Some(format!("{} {why}", member.instance))
}

/// As much of a fingerprint as people compare.
pub fn short(fingerprint: &str) -> String {
    fingerprint.chars().take(12).collect()
}

#[cfg(test)]
mod tests {
    use conclave_proto::v1::ClusterMember;

    use super::super::view::tests::{expert, healthy, member, view};
    use super::*;

    #[test]
    fn a_healthy_cluster_has_none() {
        assert_eq!(view(healthy()).warnings, [""; 0]);
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(
            view(vec![member("router", "r"), expert("e", &[0, 1, 2])]).warnings,
            ["no attention replica is ready", "cell 3 has no ready replica"]
        );
        let mut members = healthy();
        members[3].state = "loading".into();
        assert_eq!(view(members).warnings, ["cells 2, 3 have no ready replica"]);
    }

    #[test]
    fn an_unreachable_coordinator_comes_first() {
        let mut lost = view(vec![]);
        lost.coordinator_reachable = false;
        let warnings = of(&lost);
        assert!(warnings[0].contains("not reachable") && warnings.len() == 3, "{warnings:?}");
    }

    #[test]
    fn mixtures_and_members_set_aside_are_named() {
        let mut members = healthy();
        members.push(ClusterMember {
            fingerprint: "beef".repeat(16),
            numerics: "cpu-portable-3".into(),
            ..expert("expert-3", &[0])
        });
        members.push(ClusterMember { numerics: "reference-1".into(), ..expert("expert-4", &[0]) });
        members.push(ClusterMember { health: "set-aside".into(), ..expert("expert-5", &[0]) });
        members.push(ClusterMember { health: "unverified".into(), ..expert("expert-6", &[0]) });
        assert_eq!(
            view(members).warnings,
            [
                "expert-3 has another checkpoint (beefbeefbeef, not f00df00df00d): it gets no work",
                "numerics ids are mixed (cpu-avx2-3, reference-1): bits may differ between replicas",
                "expert-5 is set aside: calls to it failed",
                "expert-6 has no record any more, its lease has run out: used until a call to it fails",
            ]
        );
    }
}
