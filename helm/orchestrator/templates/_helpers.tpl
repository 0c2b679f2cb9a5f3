{{/* Labels of every object; give (dict "root" $ "component" NAME). */}}
{{- define "labels" -}}
{{ include "selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: fednnunet
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{/* What a pod is known by: the same in every version, so that an upgrade replaces no pod that did not change. */}}
{{- define "selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* REPOSITORY:TAG, or REPOSITORY@DIGEST where a digest is given; (dict "root" $ "image" VALUES). */}}
{{- define "image" -}}
{{- with .image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default (printf "%s-cpu" $.root.Chart.AppVersion) }}{{ end }}
{{- end -}}
{{- end }}

{{/* PodSecurity "restricted"; 10001 is the images' user, and owns what the volumes hold. */}}
{{- define "pod.security" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "container.security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Whether the state is gone with the pod. */}}
{{- define "ephemeral" -}}
{{- if or .Values.state.ephemeral (and .Values.demo.enabled (not .Values.state.existingClaim)) }}yes{{ end -}}
{{- end }}

{{/* What every pod of this chart has in common at its end. */}}
{{- define "scheduling" -}}
nodeSelector:
  {{- toYaml .Values.nodeSelector | nindent 2 }}
tolerations:
  {{- toYaml .Values.tolerations | nindent 2 }}
imagePullSecrets:
  {{- toYaml .Values.imagePullSecrets | nindent 2 }}
priorityClassName: {{ .Values.priorityClassName | quote }}
{{- end }}

{{/* State, authority (the demo's lies in the state) and temporary files, as every container of the pod has them. */}}
{{- define "mounts" -}}
- name: state
  mountPath: /state
  {{- with .Values.state.subPath }}
  subPath: {{ . }}
  {{- end }}
{{- if not .Values.demo.enabled }}
- name: authority
  mountPath: /state/authority
  readOnly: true
{{- end }}
- name: tmp
  mountPath: /tmp
{{- end }}
