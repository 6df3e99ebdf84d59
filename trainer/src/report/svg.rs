//! Line plots as SVG, by hand: panels in two columns, axes with round ticks, a legend, light background.

use std::fmt::Write;

/// Points a line keeps; more are averaged in groups.
const MAX_POINTS: usize = 400;
const COLUMNS: usize = 2;
const WIDTH: f64 = 520.0;
const HEIGHT: f64 = 330.0;
const LEFT: f64 = 62.0;
const RIGHT: f64 = 18.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 46.0;
/// Told apart by most colour-blind readers too (Okabe and Ito's palette).
const COLORS: [&str; 4] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"];

/// One plot.
#[derive(Clone, Debug, Default)]
pub(super) struct Panel {
    pub title: String,
    pub x_label: String,
    pub series: Vec<Series>,
    /// x positions of vertical dashed lines.
    pub marks: Vec<f64>,
    /// Let the y axis begin at 0.
    pub from_zero: bool,
}

/// One line. Points that are not finite are left out.
#[derive(Clone, Debug, Default)]
pub(super) struct Series {
    pub name: String,
    pub points: Vec<(f64, f64)>,
    /// Draw every point as a dot too.
    pub dots: bool,
}

/// The whole picture.
pub(super) fn render(panels: &[Panel]) -> String {
    let rows = panels.len().div_ceil(COLUMNS).max(1);
    let (width, height) = (WIDTH * COLUMNS as f64, HEIGHT * rows as f64);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
         height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\" fill=\"#333\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n"
    );
    for (i, panel) in panels.iter().enumerate() {
        let (column, row) = (i % COLUMNS, i / COLUMNS);
        let _ = writeln!(
            out,
            "<g transform=\"translate({} {})\">",
            WIDTH * column as f64,
            HEIGHT * row as f64
        );
        draw(&mut out, panel);
        out.push_str("</g>\n");
    }
    out.push_str("</svg>\n");
    out
}

fn draw(out: &mut String, panel: &Panel) {
    let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
    let _ = writeln!(
        out,
        "<text x=\"{LEFT}\" y=\"24\" font-weight=\"bold\">{}</text>",
        escape(&panel.title)
    );
    let _ = writeln!(
        out,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
        (LEFT + right) / 2.0,
        HEIGHT - 10.0,
        escape(&panel.x_label)
    );
    let lines: Vec<(usize, Vec<(f64, f64)>)> =
        panel.series.iter().map(|s| thinned(&s.points)).collect();
    let all = || lines.iter().flat_map(|(_, points)| points.iter().copied());
    if all().next().is_none() {
        let (x, y) = ((LEFT + right) / 2.0, (TOP + bottom) / 2.0);
        let _ = writeln!(
            out,
            "<text x=\"{x}\" y=\"{y}\" text-anchor=\"middle\" fill=\"#888\">no data</text>"
        );
        return;
    }
    let x_axis = Axis::of(all().map(|p| p.0), 6, true, false);
    let y_axis = Axis::of(all().map(|p| p.1), 5, false, panel.from_zero);
    let at_x = |x: f64| LEFT + x_axis.share(x) * (right - LEFT);
    let at_y = |y: f64| bottom - y_axis.share(y) * (bottom - TOP);

    for tick in y_axis.ticks() {
        let (y, label) = (at_y(tick), y_axis.label(tick));
        let _ = writeln!(
            out,
            "<path d=\"M{LEFT} {y:.1}H{right}\" stroke=\"#e4e4e4\"/>"
        );
        let _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            LEFT - 7.0,
            y + 4.0
        );
    }
    for tick in x_axis.ticks() {
        let (x, label) = (at_x(tick), x_axis.label(tick));
        let _ = writeln!(out, "<path d=\"M{x:.1} {bottom}v5\" stroke=\"#888\"/>");
        let _ = writeln!(
            out,
            "<text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{label}</text>",
            bottom + 18.0
        );
    }
    let _ = writeln!(
        out,
        "<path d=\"M{LEFT} {TOP}V{bottom}H{right}\" fill=\"none\" stroke=\"#888\"/>"
    );
    for x in panel
        .marks
        .iter()
        .copied()
        .filter(|x| (0.0..=1.0).contains(&x_axis.share(*x)))
    {
        let x = at_x(x);
        let _ = writeln!(
            out,
            "<path d=\"M{x:.1} {TOP}V{bottom}\" stroke=\"#999\" stroke-dasharray=\"3 3\"/>"
        );
    }

    let mut legend_x = right;
    for (i, (series, (group, _))) in panel.series.iter().zip(&lines).enumerate().rev() {
        let name = if *group > 1 {
            format!("{}, mean of {group}", series.name)
        } else {
            series.name.clone()
        };
        // About 6.5 px a letter: enough to keep the entries apart without font metrics.
        legend_x -= 6.5 * name.chars().count() as f64 + 32.0;
        let (color, name) = (COLORS[i % COLORS.len()], escape(&name));
        let _ = writeln!(
            out,
            "<path d=\"M{legend_x:.1} 20h16\" stroke=\"{color}\" stroke-width=\"2.5\"/>"
        );
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"24\">{name}</text>",
            legend_x + 21.0
        );
    }
    for (i, (series, (_, points))) in panel.series.iter().zip(&lines).enumerate() {
        let color = COLORS[i % COLORS.len()];
        let at: Vec<(f64, f64)> = points.iter().map(|&(x, y)| (at_x(x), at_y(y))).collect();
        if at.len() > 1 {
            let path: Vec<String> = at.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            let _ = writeln!(
                out,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"1.6\"/>",
                path.join(" ")
            );
        }
        if series.dots || at.len() == 1 {
            for (x, y) in at {
                let _ = writeln!(
                    out,
                    "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.6\" fill=\"{color}\"/>"
                );
            }
        }
    }
}

/// The finite points, and how many of them one stands for after averaging.
fn thinned(points: &[(f64, f64)]) -> (usize, Vec<(f64, f64)>) {
    let finite: Vec<(f64, f64)> = points
        .iter()
        .copied()
        .filter(|(x, y)| x.is_finite() && y.is_finite())
        .collect();
    let group = finite.len().div_ceil(MAX_POINTS).max(1);
    let mean = |chunk: &[(f64, f64)]| {
        let count = chunk.len() as f64;
        (
            chunk.iter().map(|p| p.0).sum::<f64>() / count,
            chunk.iter().map(|p| p.1).sum::<f64>() / count,
        )
    };
    (group, finite.chunks(group).map(mean).collect())
}

/// A range and the distance of its ticks.
#[derive(Debug)]
struct Axis {
    low: f64,
    high: f64,
    step: f64,
}

impl Axis {
    /// Covers finite `values`, of which there is at least one; `whole` for steps and epochs.
    fn of(values: impl Iterator<Item = f64>, num_ticks: u32, whole: bool, from_zero: bool) -> Axis {
        let (mut low, mut high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| {
            (l.min(v), h.max(v))
        });
        if from_zero {
            (low, high) = (low.min(0.0), high.max(0.0));
        }
        if high - low <= 1e-12 * high.abs().max(low.abs()) {
            let around = if whole {
                1.0
            } else {
                (high.abs() * 0.1).max(1e-9)
            };
            low = if from_zero { low } else { low - around };
            high += around;
        }
        let rough = (high - low) / f64::from(num_ticks);
        let magnitude = 10f64.powf(rough.log10().floor());
        let factor = [1.0, 2.0, 5.0, 10.0]
            .into_iter()
            .find(|f| f * magnitude >= rough)
            .unwrap_or(10.0);
        let step = if whole {
            (factor * magnitude).max(1.0)
        } else {
            factor * magnitude
        };
        if !whole {
            low = (low / step).floor() * step;
            high = (high / step).ceil() * step;
        }
        Axis { low, high, step }
    }

    fn share(&self, value: f64) -> f64 {
        (value - self.low) / (self.high - self.low)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        // A thousandth of a step allows for rounding at both ends.
        let first = (self.low / self.step - 1e-3).ceil() as i64;
        let last = (self.high / self.step + 1e-3).floor() as i64;
        let step = self.step;
        (first..=last).map(move |i| i as f64 * step)
    }

    fn label(&self, value: f64) -> String {
        let largest = self.low.abs().max(self.high.abs());
        if largest < 1e-3 {
            return super::short(value);
        }
        if self.step >= 1000.0 && value != 0.0 {
            return format!("{}k", super::short(value / 1000.0));
        }
        let decimals = (-self.step.log10().floor()).max(0.0) as usize;
        format!("{value:.decimals$}")
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Panics unless `svg` is well-formed: tags nest, attributes are quoted, nothing is unescaped.
    pub fn assert_well_formed(svg: &str) {
        let mut open: Vec<&str> = Vec::new();
        let mut rest = svg;
        while let Some(start) = rest.find('<') {
            assert!(
                !rest[..start].contains('>'),
                "a bare > before {}",
                &rest[start..]
            );
            for (at, _) in rest[..start].match_indices('&') {
                let entity = &rest[at..start];
                assert!(
                    ["&amp;", "&lt;", "&gt;", "&quot;"]
                        .iter()
                        .any(|e| entity.starts_with(e)),
                    "{entity}"
                );
            }
            let end = start + rest[start..].find('>').expect("a tag ends");
            let tag = &rest[start + 1..end];
            let name = tag
                .trim_start_matches('/')
                .split([' ', '/'])
                .next()
                .unwrap();
            assert_eq!(tag.matches('"').count() % 2, 0, "quotes of <{tag}>");
            assert!(
                !tag.contains('<') && !tag.contains("NaN") && !tag.contains("inf"),
                "<{tag}>"
            );
            match (tag.starts_with('/'), tag.ends_with('/')) {
                (true, _) => assert_eq!(open.pop(), Some(name), "closing tags nest"),
                (false, false) => open.push(name),
                (false, true) => {}
            }
            rest = &rest[end + 1..];
        }
        assert!(
            open.is_empty() && rest.trim().is_empty(),
            "left open: {open:?}"
        );
    }

    fn panel(points: &[(f64, f64)]) -> Panel {
        let series = Series {
            name: "a <b> & \"c\"".into(),
            points: points.to_vec(),
            dots: false,
        };
        Panel {
            title: "x < y".into(),
            x_label: "step".into(),
            series: vec![series],
            ..Panel::default()
        }
    }

    #[test]
    fn every_amount_of_data_is_well_formed() {
        let many: Vec<(f64, f64)> = (0..5000)
            .map(|i| (f64::from(i), f64::from(i).sin()))
            .collect();
        for points in [
            &[][..],
            &[(1.0, 2.0)],
            &[(1.0, 2.0), (1.0, 2.0)],
            &[(0.0, 0.0)],
            &[(0.0, f64::NAN)],
            &many,
        ] {
            assert_well_formed(&render(&[panel(points)]));
            assert_well_formed(&render(&[Panel {
                from_zero: true,
                ..panel(points)
            }]));
        }
        assert_well_formed(&render(&[]));
        assert!(render(&[panel(&[(0.0, f64::INFINITY)])]).contains("no data"));
        assert!(
            render(&[panel(&[(1.0, 2.0)])]).contains("<circle"),
            "one point is a dot"
        );
    }

    #[test]
    fn long_lines_are_averaged_and_say_so() {
        let points: Vec<(f64, f64)> = (0..1000)
            .map(|i| (f64::from(i), f64::from(i % 2)))
            .collect();
        let (group, thin) = thinned(&points);
        assert_eq!((group, thin.len()), (3, 334));
        assert_eq!(thin[0], (1.0, 1.0 / 3.0));
        assert!(render(&[panel(&points)]).contains(", mean of 3"));
    }

    #[test]
    fn ticks_are_round_and_cover_the_data() {
        let labels = |values: &[f64], whole, zero| {
            let axis = Axis::of(values.iter().copied(), 5, whole, zero);
            axis.ticks().map(|t| axis.label(t)).collect::<Vec<_>>()
        };
        assert_eq!(
            labels(&[0.13, 0.87], false, false),
            ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
        );
        assert_eq!(
            labels(&[180.0, 412.0], false, true),
            ["0", "100", "200", "300", "400", "500"]
        );
        assert_eq!(labels(&[1.0, 3.0], true, false), ["1", "2", "3"]);
        assert_eq!(
            labels(&[1.0, 20000.0], true, false),
            ["0", "5k", "10k", "15k", "20k"]
        );
        assert_eq!(
            labels(&[0.0, 0.00015], false, true),
            ["0", "0.00005", "0.0001", "0.00015"]
        );
    }
}
