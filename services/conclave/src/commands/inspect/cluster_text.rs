//! The view of a cluster as text.

use super::{
    view::{Cell as ModelCell, Member, ROLES, View},
    warnings::short,
};
use crate::commands::print::{
    Cell, Column, Ink, Style, Table, fields,
    units::{age, bar, count},
};

/// Characters of the longest bar.
const BAR: usize = 16;

/// The whole view.
pub fn render(view: &View, width: usize, style: Style) -> String {
    let mut text: String =
        view.warnings.iter().map(|warning| format!("{}: {warning}\n", style.paint(Ink::Warning, "warning"))).collect();
    text.push_str(&fields(&heading(view), 0, width, style));
    text.push('\n');
    text.push_str(&members(view).render(width, style));
    if !view.cells.is_empty() {
        text.push('\n');
        text.push_str(&cells(&view.cells).render(width, style));
    }
    text
}

fn heading(view: &View) -> Vec<(&'static str, String)> {
    let coordinator = if view.coordinator_reachable { "reachable" } else { "not reachable" };
    let model = &view.model;
    let context = count(model.context_limit.into());
    let mut entries = vec![
        ("cluster", format!("{}, as {} sees it; coordinator {coordinator}", view.cluster, view.url)),
        ("model", format!("{}, context {context}, fingerprint {}", model.id, short(&model.fingerprint))),
    ];
    if let [id] = view.numerics().as_slice() {
        entries.push(("numerics", format!("{id}, all members alike")));
    }
    entries
}

fn members(view: &View) -> Table {
    let is_mixed = view.numerics().len() > 1;
    let mut columns = vec![
        Column::long("MEMBER"),
        Column::text("STATE"),
        Column::text("HEALTH"),
        Column::text("CELLS"),
        Column::number("LOAD"),
        Column::number("AGE"),
    ];
    columns.extend(is_mixed.then(|| Column::long("NUMERICS")));
    columns.push(Column::long("ADDRESS"));
    let mut table = Table::new(columns);
    for role in ROLES {
        let title = match role {
            "attention" => "attention (load: sequences running and waiting)".to_owned(),
            "expert" => "expert (load: rows queued)".to_owned(),
            _ => role.to_owned(),
        };
        table.heading(Cell::new(title, Ink::Title));
        for member in view.of(role) {
            table.row(row(member, is_mixed));
        }
        if view.of(role).next().is_none() {
            table.heading(Cell::new("  none", Ink::Dim));
        }
    }
    table
}

fn row(member: &Member, is_mixed: bool) -> Vec<Cell> {
    let is_router = member.role == "router";
    let or_dash = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
    let state = match member.state.as_str() {
        "ready" => Ink::Good,
        _ => Ink::Warning,
    };
    let (health, shown) = match member.health.as_str() {
        "ok" => (Ink::Good, "ok"),
        "unknown" => (Ink::Plain, if is_router { "-" } else { "unknown" }),
        other => (Ink::Warning, other),
    };
    let load = if is_router { "-".to_owned() } else { count(member.load.into()) };
    let mut cells = vec![
        format!("  {}", member.instance).into(),
        Cell::new(&member.state, state),
        Cell::new(shown, health),
        or_dash(&member.cells).into(),
        load.into(),
        age(member.age_ms).into(),
    ];
    cells.extend(is_mixed.then(|| or_dash(&member.numerics).into()));
    cells.push(member.address.trim_start_matches("http://").into());
    cells
}

fn cells(cells: &[ModelCell]) -> Table {
    let mut table = Table::new([
        Column::text("CELL"),
        Column::number("READY"),
        Column::long("HELD BY"),
        Column::number("ROWS"),
        Column::number("SHARE"),
        Column::text(""),
    ]);
    let total: u64 = cells.iter().map(|cell| cell.rows).sum();
    let most = cells.iter().map(|cell| cell.rows).max().unwrap_or(0);
    for cell in cells {
        let ready = if cell.ready == 0 { Ink::Bad } else { Ink::Good };
        let share = if total == 0 { "-".to_owned() } else { format!("{:.1} %", 100.0 * cell.share) };
        table.row([
            cell.cell.as_str().into(),
            Cell::new(cell.ready.to_string(), ready),
            holders(cell).into(),
            count(cell.rows).into(),
            share.into(),
            Cell::new(bar(cell.rows, most, BAR), Ink::Dim),
        ]);
    }
    table
}

/// The names of a cell's replicas; those that are not ready say what they are.
fn holders(cell: &ModelCell) -> String {
    let named = cell.replicas.iter().map(|replica| match replica.state.as_str() {
        "ready" => replica.instance.clone(),
        state => format!("{} ({state})", replica.instance),
    });
    let names: Vec<String> = named.collect();
    if names.is_empty() { "nobody".into() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use conclave_proto::v1::ClusterMember;

    use super::super::view::tests::{expert, healthy, view};
    use super::*;

    #[test]
    fn a_cluster_is_shown_in_eighty_columns() {
        let text = render(&view(healthy()), 80, Style::PLAIN);
        let expected = "\
cluster   default, as http://127.0.0.1:50051 sees it; coordinator reachable
model     demo, context 0, fingerprint f00df00df00d
numerics  cpu-avx2-3, all members alike

MEMBER         STATE  HEALTH  CELLS  LOAD  AGE  ADDRESS
router
  router-1     ready  -       -         -   1m  127.0.0.1:7000
attention (load: sequences running and waiting)
  attention-1  ready  ok      -         0   1m  127.0.0.1:7000
expert (load: rows queued)
  expert-1     ready  ok      0-1       0   1m  127.0.0.1:7000
  expert-2     ready  ok      2-3       0   1m  127.0.0.1:7000

CELL  READY  HELD BY   ROWS   SHARE
0         1  expert-1   100  10.0 %  ████
1         1  expert-1   200  20.0 %  ████████
2         1  expert-2   300  30.0 %  ████████████
3         1  expert-2   400  40.0 %  ████████████████
";
        assert_eq!(text, expected);
    }

    #[test]
    fn drawn_names_mixed_numerics_and_members_set_aside_still_fit() {
        let mut members = healthy();
        members[1].instance = "attention-abcdefgh".into();
        for name in ["expert-abcdefgh", "expert-ijkmnpqr", "expert-stuvwxyz"] {
            let address = "http://expert-0.experts.models.svc.cluster.local:7000".into();
            let health = "set-aside".into();
            members.push(ClusterMember {
                numerics: "reference-1".into(),
                address,
                health,
                ..expert(name, &[0, 1, 2, 3])
            });
        }
        let text = render(&view(members), 80, Style::PLAIN);
        assert!(text.starts_with("warning: numerics ids are mixed"), "{text}");
        assert!(text.contains("NUMERICS") && text.contains("set-aside"), "{text}");
        let tables = text.split_once("MEMBER").unwrap().1;
        assert!(tables.lines().all(|line| line.chars().count() <= 80), "{text}");
    }

    #[test]
    fn what_is_not_there_is_said() {
        let text =
            render(&view(vec![ClusterMember { state: "loading".into(), ..expert("e", &[0]) }]), 80, Style::PLAIN);
        assert!(text.contains("attention (load: sequences running and waiting)\n  none\n"), "{text}");
        assert!(text.contains("0         0  e (loading)"), "{text}");
        assert!(text.contains("3         0  nobody"), "{text}");
    }
}
