//! Keys and records as they stand in etcd.

use conclave_proto::InstanceId;

use crate::{ClusterError, Member, Role};

/// The keys of one cluster: `/conclave/<cluster>/members/<role>/<instance>` and `/conclave/<cluster>/claims`.
#[derive(Debug, Clone)]
pub(super) struct Keys {
    root: String,
}

impl Keys {
    /// # Errors
    /// When the cluster's name cannot stand in a key.
    pub(super) fn new(cluster: &str) -> Result<Self, ClusterError> {
        check_name("cluster", cluster)?;
        Ok(Self { root: format!("/conclave/{cluster}/") })
    }

    /// Prefix of everything in the cluster.
    pub(super) fn root(&self) -> &str {
        &self.root
    }

    /// Prefix of all members.
    pub(super) fn members(&self) -> String {
        format!("{}members/", self.root)
    }

    pub(super) fn member(&self, role: Role, instance: &InstanceId) -> String {
        format!("{}members/{role}/{instance}", self.root)
    }

    /// Written with every record of an expert: its revision guards the view that a placement was made from.
    pub(super) fn claims(&self) -> String {
        format!("{}claims", self.root)
    }

    /// The member that a key is of; none for another key.
    pub(super) fn parse(&self, key: &[u8]) -> Option<(Role, InstanceId)> {
        let path = std::str::from_utf8(key).ok()?.strip_prefix(&self.members())?;
        let (role, instance) = path.split_once('/')?;
        let role = Role::ALL.into_iter().find(|known| known.name() == role)?;
        Some((role, InstanceId(instance.to_owned())))
    }

    /// Reads a record.
    ///
    /// # Errors
    /// When it is no member's, or not the one of its key.
    pub(super) fn decode(&self, key: &[u8], value: &[u8]) -> Result<Member, ClusterError> {
        let name = String::from_utf8_lossy(key);
        let wrong = |message: String| ClusterError::Protocol(format!("record {name}: {message}"));
        let (role, instance) = self.parse(key).ok_or_else(|| wrong("not a member's key".to_owned()))?;
        let member: Member = serde_json::from_slice(value).map_err(|error| wrong(error.to_string()))?;
        if (member.role, &member.instance) != (role, &instance) {
            return Err(wrong(format!("holds {} {}, expected {role} {instance}", member.role, member.instance)));
        }
        Ok(member)
    }
}

/// # Errors
/// When the member's id cannot stand in a key or the record cannot be written.
pub(super) fn encode(member: &Member) -> Result<Vec<u8>, ClusterError> {
    check_name("instance", &member.instance.0)?;
    serde_json::to_vec(member)
        .map_err(|error| ClusterError::Protocol(format!("record of {}: {error}", member.instance)))
}

fn check_name(what: &str, name: &str) -> Result<(), ClusterError> {
    conclave_serve::args::name(name).map(drop).map_err(|error| ClusterError::Protocol(format!("{what} {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::member::fixture::expert;

    #[test]
    fn a_record_is_read_as_written() {
        let keys = Keys::new("c").expect("a name");
        let member = expert("a.1", &[0, 3]);
        let key = keys.member(member.role, &member.instance);
        assert_eq!(key, "/conclave/c/members/expert/a.1");
        let value = encode(&member).expect("plain data");
        assert_eq!(keys.decode(key.as_bytes(), &value).expect("its own"), member);
    }

    #[test]
    fn what_is_not_a_members_record_is_refused() {
        let keys = Keys::new("c").expect("a name");
        let value = encode(&expert("a", &[])).expect("plain data");
        for (key, value, found) in [
            ("/conclave/c/members/expert/b", &value[..], "holds expert a, expected expert b"),
            ("/conclave/c/members/router/a", &value[..], "holds expert a, expected router a"),
            ("/conclave/c/members/cook/a", &value[..], "not a member's key"),
            ("/conclave/c/claims", &value[..], "not a member's key"),
            ("/conclave/c/members/expert/a", &b"{}"[..], "missing field"),
            ("/conclave/c/members/expert/a", &b"\xff"[..], "expected value"),
        ] {
            let error = keys.decode(key.as_bytes(), value).expect_err(key).to_string();
            assert!(error.contains(key) && error.contains(found), "{error}");
        }
        assert!(Keys::new("a/b").is_err());
        assert!(encode(&expert("a/b", &[])).is_err());
    }
}
